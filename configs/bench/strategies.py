"""Every way of drafting on the demo models, batch 1 and 8, greedy and sampled.

    python decode/benchmark.py --config=configs/bench/strategies.py

About 40 minutes on two CPU cores; the corpus of what the target learnt from is made first, if it is
not there. Expect "yes" wherever the table can tell; at batch 1 and temperature 0 about 2 tokens per
pass from what copies and retrieves, 2.8 from the draft model and from the target with fewer slots
or bits, 4.3 from TriForce's hierarchy; at batch 8 no gain on CPU.
"""

from ml_collections import ConfigDict

from configs.bench import demo

BOTH = demo.GREEDY + demo.SAMPLED
DRAFTERS = "specjax.drafters"
LAYERS = (0, 5, 8)  # of python train/calibrate.py
# Methods without a draft model, which guess in no pass of the target's weights.
DRAFT_FREE = (
    *("jacobi", "lookahead", "SCD", "lookup", "n-gram", "N-Grammys", "recycling", "reference"),
    *("retrieval", "suffix"),
)


def call(path: str, **arguments: object) -> dict:
    return {"call": path, **arguments}


def drafter(path: str, **arguments: object) -> dict:
    return call(f"{DRAFTERS}.{path}", **arguments)


def choose(name: str) -> dict:
    return drafter(f"grow.{name}")


def build(path: str, choose_by: str, **arguments: object) -> dict:
    return drafter(path, choose=choose(choose_by), **arguments)


def method(
    drafts: dict,
    rule: str = "match",
    temperatures: tuple[float, ...] = BOTH,
    weights: object = None,
) -> dict:
    verifier = call(f"specjax.verifiers.{rule}.{rule}")
    found = {**demo.method(drafts, verifier, temperatures)}
    return found if weights is None else {**found, "weights": weights}


def of_target(path: str, num_tokens: int, **arguments: object) -> dict:
    """A part of the target as a draft of its own, in a chain."""
    chain = build("grow.chain", "coupled", num_tokens=num_tokens)
    return drafter(path, target="@target", build=chain, **arguments)


def of_model(builder: dict, model: object = "@draft") -> dict:
    return drafter("model.model", draft_model=model, build=builder)


def decoded(target: object, drafts: dict) -> dict:
    """A decoder of a draft, for cascades."""
    return call("specjax.engine.decoder", target=target, drafter=drafts, verifier=demo.MATCH)


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.output = "runs/strategies"
    c.drafts = {"draft": "checkpoints/draft"}
    c.batch_sizes = (1, 8)
    c.costs = 0.3  # seconds of each pass of each method in every repeat: shorter ones are noise
    corpus = call("train.corpus.made", target=c.target, output="runs/corpus")
    # Coupled chains are greedy ones at temperature 0, and one program serves both temperatures.
    chain = build("grow.chain", "coupled", num_tokens=4)
    lookup = drafter("lookup.lookup", num_tokens=4)
    copying = drafter("lookup.lookup", num_tokens=2)
    view = call("specjax.models.streaming.streaming", model="@target", num_sinks=4, window=60)
    methods = {
        "none": method(demo.NONE),
        # The target's own guesses, over and over.
        "jacobi": method(drafter("jacobi.jacobi", num_tokens=4)),
        "lookahead": method(
            drafter("lookahead.lookahead", target="@target", width=3, ngram=3, num_guesses=2)
        ),
        "SCD": method(
            drafter(
                "speculative_jacobi.speculative_jacobi",
                target="@target",
                num_tokens=4,
                choose=choose("coupled"),
            )
        ),
        "SJD": method(
            drafter(
                "speculative_jacobi.speculative_jacobi",
                target="@target",
                num_tokens=4,
                choose=choose("without_replacement"),
            ),
            "block",
            demo.SAMPLED,
        ),
        # What followed before.
        "lookup": method(lookup),
        "n-gram": method(drafter("ngram.ngram", num_tokens=4)),
        "N-Grammys": method(
            drafter("ngrammys.ngrammys", target="@target", num_paths=2, num_tokens=3),
            weights=drafter("ngrammys.bigrams", target="@target", params="@target_params", k=2),
        ),
        "recycling": method(
            drafter(
                "recycling.recycling",
                target="@target",
                parents=drafter("recycling.tree", num_nodes=7, depth=4),
            )
        ),
        "reference": method(drafter("lookup.reference", num_tokens=4), weights=corpus),
        "retrieval": method(
            drafter("retrieval.retrieval", num_nodes=7, num_tokens=4), weights=corpus
        ),
        "suffix": method(drafter("suffix.suffix", num_nodes=7, num_tokens=4), weights=corpus),
        # The target with less of it.
        "layer skip": method(of_target("layer_skip.layer_skip", 2, layers=LAYERS)),
        "streaming": method(
            of_target("sparse.sparse", 2, view=drafter("sparse.streaming", num_sinks=4, window=60))
        ),
        "SnapKV": method(
            of_target(
                "sparse.sparse",
                2,
                view=drafter("sparse.snapkv", budget=48, window=16, refresh=32),
            )
        ),
        "int8": method(
            of_target("quantized.quantized", 2),
            weights=drafter("quantized.int8", params="@target_params"),
        ),
        # A draft model.
        "chain": method(of_model(chain)),
        "chain that stops": method(
            of_model(
                build(
                    "adaptive.chain",
                    "coupled",
                    num_tokens=6,
                    stop=drafter("adaptive.confidence", threshold=0.4),
                )
            )
        ),
        "dynamic tree": method(of_model(drafter("grow.dynamic", num_nodes=7, width=2, depth=4))),
        "best-first tree": method(
            of_model(build("adaptive.best_first", "coupled", width=1, num_children=2, depth=3))
        ),
        "sampled chain": method(
            of_model(build("grow.chain", "without_replacement", num_tokens=4)),
            "block",
            demo.SAMPLED,
        ),
        "sampled best-first": method(
            of_model(
                build(
                    "adaptive.best_first", "without_replacement", width=1, num_children=2, depth=3
                )
            ),
            "traversal",
            demo.SAMPLED,
        ),
        # Several.
        "cascade": method(
            drafter("cascade.cascade", inner=decoded("@draft", copying), num_tokens=4),
            weights=call("specjax.types.Params", target="@draft_params"),
        ),
        "TriForce": method(
            drafter(
                "cascade.cascade",
                inner=decoded(view, of_model(build("grow.chain", "coupled", num_tokens=2))),
                num_tokens=4,
            ),
            weights=call("specjax.types.Params", target="@target_params", drafter="@draft_params"),
        ),
        "horizontal": method(
            drafter(
                "horizontal.horizontal",
                first=of_model(build("grow.chain", "coupled", num_tokens=3)),
                second=copying,
            ),
            weights=("@draft_params", ()),
        ),
        "combined": method(
            drafter("combine.combine", drafters=(of_model(chain), copying)),
            weights=("@draft_params", ()),
        ),
        "switch": switch((lookup, of_model(chain)), costs=(1.25, 1.6)),
    }
    c.methods = ConfigDict(sort_keys=False)  # the first is the baseline
    for name, found in methods.items():
        c.methods[name] = found
    return c


def switch(drafters: tuple[dict, dict], costs: tuple[float, float]) -> dict:
    """Either of two, by how well they have done; costs in passes of plain decoding."""
    decoders = tuple(
        call(
            "specjax.engine.decoder",
            target="@target",
            drafter=drafter("combine.alternate", i=i, drafters=drafters),
            verifier=demo.MATCH,
            eos_ids="@eos_ids",
        )
        for i in range(len(drafters))
    )
    return {
        "decoder": call("specjax.schedulers.switch", decoders=decoders, costs=costs),
        "verifier": demo.MATCH,
        "temperatures": BOTH,
        "weights": ((), "@draft_params"),
    }
