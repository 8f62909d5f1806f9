"""What a pass over several tokens costs on CPU beside a pass over one, at 30M and 100M parameters.

    pip install -e '.[parity]'
    python decode/benchmark.py --config=configs/bench/cpu_kernels.py

About 6 minutes on two CPU cores. With bfloat16 weights on a processor with AVX-512, passes over 2,
4, 8, 16 and 32 tokens should take at most 1.1, 1.2, 1.3, 1.7 and 2.6 times as long as one over one,
which should be 1.5 times as fast as XLA's own operations and no slower than transformers.
"""

from ml_collections import ConfigDict

from configs.bench import llama_30m


def variant(weights: str, cache: str = "float32", kernels: bool = True) -> dict:
    return {"weights": weights, "cache": cache, "kernels": kernels}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.benchmark = "decode.passes.run"
    c.output = "runs/cpu_kernels"
    c.models = ConfigDict(sort_keys=False)
    c.models["llama-30m"] = llama_30m.get_config().target
    c.models["llama-100m"] = {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 64,
    }
    c.variants = ConfigDict(sort_keys=False)  # the last is the baseline
    c.variants["bfloat16"] = variant("bfloat16", "bfloat16")
    c.variants["bfloat16 weights"] = variant("bfloat16")
    c.variants["int8"] = variant("int8")
    c.variants["float32"] = variant("float32")
    c.variants["float32 by XLA"] = variant("float32", kernels=False)
    c.num_tokens = (1, 2, 4, 8, 16, 32)  # of a pass
    c.at_most = (1.0, 1.1, 1.2, 1.3, 1.7, 2.6)  # times one token's time
    c.context_length = 512
    c.max_new_tokens = 64
    c.max_length = 1024  # slots of the cache
    c.transformers = ("float32", "bfloat16")  # plain decoding there; () leaves it out
    c.products = ((1, 4096, 4096), (8, 4096, 4096), (32, 4096, 4096))  # rows, outputs, inputs
    c.repeats = 9
    c.seconds = 0.25  # of every pass in every repeat
    c.seed = 0
    return c
