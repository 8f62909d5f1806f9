"""How far logits are from transformers' on the same files, for every family of models.

    pip install -e '.[parity]'
    python decode/parity.py                             # configs/bench/parity.py

Each variant of the config is a tiny random model that transformers makes and saves. Figures are
largest differences of logits, the products of float32 at full precision:

    uncached    one causal pass over whole sequences
    cached      token by token
    tree        nodes fed at once, or level by level, after prefixes of different lengths; each
                beside the end of its path alone in transformers
    saved       transformers on what is saved here, beside transformers on its own file

and with weights rounded to bfloat16

    weights     one causal pass and token by token, all else in float32 on both sides
    bfloat16    activations rounded too, in standard deviations of the logits; beside it how far
                transformers' own are from its float32, by which the tolerance goes: two that round
                as much, each in its own order, are at most twice as far apart. Where there are
                experts rounding may choose another, and one token be as far off as logits go, so
                there it is the median token's largest difference that is held.

Exits with status 1 and a line that names what is beyond its tolerance, or else with status 0.
Writes results.json, results.md and results.png into `config.output`, and with
`--config.golden=DIRECTORY` the models and what transformers says of them, by which the tests go on
without it.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

import specjax
from specjax import cache as caches
from specjax import plots, scripts, trees
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, forward, num_params, transformer
from specjax.types import Array, Block, Cache, PyTree

EXPECTED, VERSIONS = "expected.safetensors", "versions.json"
FULL = ("uncached", "cached", "tree", "tree_by_level", "weights", "weights_cached")
MOST_BYTES = 2_000_000  # of all golden files


class Expected(NamedTuple):
    """What transformers says of a model. Logits are float32, whatever they were computed in."""

    tokens: np.ndarray  # [B, N] int32
    logits: np.ndarray  # [B, N, V]
    parents: np.ndarray  # [M] int32, of a tree
    prefix: np.ndarray  # [B] int32, how many of the tokens it follows
    nodes: np.ndarray  # [B, M] int32, its tokens
    node_logits: np.ndarray  # [B, M, V], each at the end of its path alone
    rounded_logits: np.ndarray  # [B, N, V], of weights rounded to bfloat16
    bfloat16_logits: np.ndarray  # [B, N, V], of activations in bfloat16 too


def main(c: ConfigDict) -> None:
    records = run(c)
    failed = [f"{r['variant']}: {name}" for r in records for name in beyond(c, r)]
    if failed:
        sys.exit(f"beyond its tolerance: {'; '.join(failed)}")


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
    _check(c)
    _libraries()
    console = Console()
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        with scripts.progress() as bars, jax.default_matmul_precision("highest"):
            task = bars.add_task("", total=len(c.variants))
            for name in c.variants:
                bars.update(task, description=name)
                records.append(measure(c, name, Path(scratch) / name))
                jax.clear_caches()  # about a hundred live programs exhaust LLVM
                bars.advance(task)
        if c.golden:
            _write_golden(c, Path(scratch))
    _write(c, records, console)
    return records


def measure(c: ConfigDict, name: str, directory: Path) -> dict[str, Any]:
    """Makes a variant's model in a directory, compares, and leaves it there as a golden one."""
    expected = make(c, name, directory)
    found = hf.load(directory)
    variant = c.variants[name].to_dict()
    with tempfile.TemporaryDirectory() as saved:
        save(Path(saved), found)
        theirs, info = load(Path(saved))
    odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if odd:
        raise ValueError(f"{name}: what is saved has missing or unexpected tensors {odd}.")
    return {
        "variant": name,
        "family": variant["family"],
        "options": variant["options"],
        "parameters": num_params(found.params),
        "experts": found.config.num_experts,
        "standard_deviation": float(expected.logits.std()),
        **differences(found, expected),
        **differences_by_weights(found, expected),
        **differences_in_bfloat16(found, expected),
        "saved": largest(torch_logits(theirs, expected.tokens), expected.logits),
    }


def beyond(c: ConfigDict, record: dict[str, Any]) -> list[str]:
    """What differs by more than it may."""
    which = "_median" if record["experts"] else ""
    limits = dict.fromkeys(FULL, c.tolerance) | {"saved": 0.0}
    limits[f"bfloat16{which}"] = c.bfloat16_tolerance * record[f"bfloat16_there{which}"]
    return [name for name, most in limits.items() if not record[name] <= most]


def _check(c: ConfigDict) -> None:
    tree = trees.topology(c.parents)
    longest = max(c.prefix) + int(tree.depth_of.max()) + 1
    if min(c.prefix) < 1 or longest > c.num_tokens:
        raise ValueError(
            f"prefix is {c.prefix} and num_tokens {c.num_tokens}; with the tree they need at least "
            f"1 and {longest}."
        )
    if not c.variants:
        raise ValueError("There are no variants; need at least one.")


# --------------------------------------------------------------------------------------------- here


def differences(found: hf.Checkpoint, expected: Expected) -> dict[str, float]:
    """Of a checkpoint in float32, by name."""
    config, params, tokens = found.config, found.params, expected.tokens
    one_by_one, cache = cached(config, params, tokens)
    at_once, by_level = tree(config, params, cache, expected)
    return {
        "uncached": largest(uncached(config, params, tokens), expected.logits),
        "cached": largest(one_by_one, expected.logits),
        "tree": largest(at_once, expected.node_logits),
        "tree_by_level": largest(by_level, expected.node_logits),
    }


def differences_by_weights(found: hf.Checkpoint, expected: Expected) -> dict[str, float]:
    """With weights in bfloat16, all else in float32."""
    given = found.config, _rounded(found.params), expected.tokens
    return {
        "weights": largest(uncached(*given), expected.rounded_logits),
        "weights_cached": largest(cached(*given)[0], expected.rounded_logits),
    }


def differences_in_bfloat16(found: hf.Checkpoint, expected: Expected) -> dict[str, float]:
    """Of weights and activations."""
    given = found.config, _rounded(found.params), expected.tokens
    half = np.asarray(uncached(*given, jnp.bfloat16))
    record = {}
    for name, one, other in (
        ("bfloat16", half, expected.bfloat16_logits),
        ("bfloat16_here", half, expected.logits),
        ("bfloat16_there", expected.bfloat16_logits, expected.logits),
    ):
        of_token = np.abs(one - other).max(-1) / expected.logits.std()
        record[name] = float(of_token.max())
        record[f"{name}_median"] = float(np.median(of_token))
    return record


def _rounded(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def largest(a: Any, b: Any) -> float:
    """Difference; NaN if there is one."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


def uncached(
    config: TransformerConfig, params: PyTree, tokens: np.ndarray, dtype: Any = jnp.float32
) -> Array:
    """Logits [B, N, V] of one causal pass."""
    model = transformer(config, dtype)
    return jax.jit(lambda params, tokens: forward(model, params, tokens).logits)(params, tokens)


def cached(config: TransformerConfig, params: PyTree, tokens: np.ndarray) -> tuple[Array, Cache]:
    """Logits [B, N, V] of tokens fed one by one, and the cache that holds them all then."""
    model, (b, n) = transformer(config), tokens.shape
    visible = jnp.ones((b, 1, 1), bool)
    root, one = jnp.zeros((b, 1), jnp.int32), jnp.ones(b, jnp.int32)

    @jax.jit
    def scan(params: PyTree, tokens: Array) -> tuple[Array, Cache]:
        def step(cache: Cache, token: Array) -> tuple[Cache, Array]:
            at = cache.length[:, None]
            output, block = model.apply(params, token[:, None], at, visible, cache)
            return caches.commit(cache, block, root, one), output.logits[:, 0]

        cache, logits = jax.lax.scan(step, model.init_cache(b, n), tokens.T)
        return logits.swapaxes(0, 1), cache

    return scan(params, jnp.asarray(tokens))


def tree(
    config: TransformerConfig, params: PyTree, cache: Cache, expected: Expected
) -> tuple[Array, Array]:
    """Logits [B, M, V] of a tree's nodes fed at once and level by level.

    Args:
        cache: of all tokens; slots at or beyond each row's prefix hold what must not show.
    """
    model, shape = transformer(config), trees.topology(expected.parents.tolist())
    nodes, prefix = expected.nodes, expected.prefix
    positions = (prefix[:, None] + shape.depth_of).astype(np.int32)
    beyond = np.arange(expected.tokens.shape[1]) >= prefix[:, None]

    def spoilt(x: Array) -> Array:
        return jnp.where(beyond[:, None, :, None], 1e3, x)

    cache = Cache(
        tuple(map(spoilt, cache.keys)), tuple(map(spoilt, cache.values)), jnp.asarray(prefix)
    )

    @jax.jit
    def at_once(params: PyTree, cache: Cache) -> Array:
        mask = jnp.broadcast_to(shape.mask, (len(nodes), *shape.mask.shape))
        return model.apply(params, nodes, positions, mask, cache)[0].logits

    @jax.jit
    def by_level(params: PyTree, cache: Cache) -> Array:
        block: Block | None = None
        logits = []
        for level in shape.levels:
            seen = shape.mask[level, : level[-1] + 1]
            mask = jnp.broadcast_to(seen, (len(nodes), *seen.shape))
            fed = nodes[:, level], positions[:, level], mask, cache, block
            output, block = model.apply(params, *fed)
            logits.append(output.logits)
        return jnp.concatenate(logits, 1)

    return at_once(params, cache), by_level(params, cache)


def save(directory: Path, found: hf.Checkpoint, max_shard_bytes: int | None = None) -> None:
    """All of a checkpoint."""
    ids = found.eos_ids, found.bos_id
    hf.save(directory, found.config, found.params, None, *ids, max_shard_bytes)


# -------------------------------------------------------------------------------------------- there


def make(c: ConfigDict, name: str, directory: Path) -> Expected:
    """A variant's model, saved by transformers, with what transformers says of it beside it."""
    torch, transformers = _libraries()
    variant = c.variants[name].to_dict()
    rng = np.random.default_rng(c.seed)
    torch.manual_seed(c.seed)
    config = transformers.AutoConfig.for_model(
        variant["family"], **variant["sizes"] | variant["options"]
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # all ones or zeros otherwise, which hides one that is misplaced
        for path, weight in theirs.named_parameters():
            if "bias" in path:
                weight.normal_(0, 0.3)
            elif "norm" in path or "ln_" in path:
                weight += torch.empty_like(weight).uniform_(-0.5, 0.5)
    theirs.eval().save_pretrained(directory)

    shape, prefix = trees.topology(c.parents), np.array(c.prefix, np.int32)
    tokens = rng.integers(0, config.vocab_size, (len(prefix), c.num_tokens), np.int32)
    nodes = rng.integers(0, config.vocab_size, (len(prefix), len(c.parents)), np.int32)
    alone = np.repeat(tokens, len(c.parents), 0)  # a row for each node, its path after its prefix
    ends = (prefix[:, None] + shape.depth_of).reshape(-1)
    for row in range(len(alone)):
        b, node = divmod(row, len(c.parents))
        while node >= 0:
            alone[row, prefix[b] + shape.depth_of[node]] = nodes[b, node]
            node = c.parents[node]
    node_logits = torch_logits(theirs, alone)[np.arange(len(alone)), ends]

    with tempfile.TemporaryDirectory() as scratch:
        half, _ = load(directory, "bfloat16")
        half.save_pretrained(scratch)
        rounded, _ = load(Path(scratch))
    expected = Expected(
        tokens,
        torch_logits(theirs, tokens),
        np.array(c.parents, np.int32),
        prefix,
        nodes,
        node_logits.reshape(*nodes.shape, -1),
        torch_logits(rounded, tokens),
        torch_logits(half, tokens),
    )
    safetensors.numpy.save_file(expected._asdict(), directory / EXPECTED)
    return expected


def load(directory: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
    """A model as transformers reads it, and what it says of missing and unexpected tensors.

    Args:
        dtype: of weights and activations; "auto" is that of the file.
    """
    _, transformers = _libraries()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), info


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, N, V] float32."""
    torch, _ = _libraries()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def _libraries() -> tuple[Any, Any]:
    from decode import transformers_peer  # found once `scripts.run` has put the root on the path

    torch, transformers = transformers_peer.libraries()
    torch.set_num_threads(1)  # others would be waited for longer than tiny models take
    return torch, transformers


def versions() -> dict[str, str]:
    """Of what is compared."""
    torch, transformers = _libraries()
    names = {"torch": torch, "transformers": transformers, "jax": jax, "specjax": specjax}
    return {name: str(library.__version__) for name, library in names.items()}


# ------------------------------------------------------------------------------------------ results


def read_expected(directory: Path) -> Expected:
    """What `make` has left there."""
    return Expected(**safetensors.numpy.load_file(directory / EXPECTED))


def _write_golden(c: ConfigDict, made: Path) -> None:
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(
            f"Golden files take {size} bytes; need at most {MOST_BYTES}: make sizes smaller."
        )
    golden = Path(c.golden)
    golden.mkdir(parents=True, exist_ok=True)
    for name in c.variants:  # others' are left alone
        shutil.rmtree(golden / name, ignore_errors=True)
        shutil.copytree(made / name, golden / name)
    about = {
        "made_by": f"python decode/parity.py --config.golden={c.golden}",
        "holds": "directories as transformers saved them, float32; " + EXPECTED + " is what it "
        "says of the model: logits of tokens, and of a tree's nodes after a prefix of them",
        **versions(),
    }
    (golden / VERSIONS).write_text(json.dumps(about, indent=1) + "\n")


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    results = {"versions": versions(), "records": records}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    lines = _table(c, records, console)
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots.differences(records, c.tolerance, output / "results.png")
    console.print(lines[-1], highlight=False)
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)
    if c.golden:
        console.print(f"Golden files in {c.golden}", highlight=False)


def _table(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> list[str]:
    """Prints the table; returns it in Markdown, the versions in its last line."""
    header = ["family", "options", "uncached", "cached", "tree", "bf16 weights", "saved", "bf16"]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i > 1 else "left", no_wrap=i != 1)
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for r in records:
        full = [r["uncached"], r["cached"], max(r["tree"], r["tree_by_level"])]
        full += [max(r["weights"], r["weights_cached"]), r["saved"]]
        cells = [f"{x:.0e}" if x else "0" for x in full]
        cells.append(f"{r['bfloat16']:.2f} ({r['bfloat16_there']:.2f})")
        row = [r["family"], _told(r["options"]), *cells]
        lines.append("| " + " | ".join(row) + " |")
        shown.add_row(*row, style="red" if beyond(c, r) else "")
    console.print(shown)
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*lines, "", f"{told}."]


def _told(options: dict[str, Any]) -> str:
    """Options in one line, of rotary embedding its type."""
    told = {("rope_type" if isinstance(x, dict) else name): x for name, x in options.items()}
    values = (x["rope_type"] if isinstance(x, dict) else x for x in told.values())
    return ", ".join(f"{name} {x}" for name, x in zip(told, values, strict=True))


if __name__ == "__main__":
    scripts.run(main, "configs/bench/parity.py")
