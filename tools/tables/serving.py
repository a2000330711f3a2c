"""Tables of docs/serving.md, from what benchmarks/serving.py wrote."""

from __future__ import annotations

from typing import Any

from tools.tables.places import INTEL, read

from fastff.report.markdown import markdown_table

NAMES = {
    "fastff-native": "fastff, native",
    "fastff-torch": "fastff, PyTorch",
    "infinity-torch": "infinity-emb, PyTorch",
}


def serving() -> str:
    """Servers under load, what HTTP adds, and the long run."""
    run: dict[str, Any] = read(INTEL / "serving.json")
    head = ["server", "clients", "sentences a request", "requests/s", "sentences/s", "p50, ms", "p95, ms"]
    rows = [
        [
            NAMES.get(one["server"], one["server"]),
            str(one["clients"]),
            str(one["sentences"]),
            f"{one['requests_per_s']:,.0f}",
            f"{one['sentences_per_s']:,.0f}",
            f"{one['p50_ms']:,.1f}",
            f"{one['p95_ms']:,.1f}",
        ]
        for one in sorted(run["load"], key=lambda one: (-one["clients"], one["sentences"], one["server"]))
    ]
    return "\n\n".join([markdown_table(head, rows), *_words(run)])


def _words(run: dict[str, Any]) -> list[str]:
    words = []
    if one := run.get("overhead"):
        words.append(
            f"One request of one sentence takes {one['request_ms']:.2f} ms, the engine alone "
            f"{one['engine_ms']:.2f}: HTTP adds {one['overhead_ms']:.2f} ms."
        )
    if one := run.get("soak"):
        memory = one["memory_mib"]
        words.append(
            f"{one['requests']:,} requests of 64 clients, with one in fifty a request that breaks off or is nonsense: "
            f"{one['lost']} lost, {one['wrong']} wrong; {memory[1]:.0f} MiB after a twentieth of them, "
            f"{memory[-1]:.0f} at the end."
        )
    if one := run.get("first_token"):
        words.append(
            f"Generation (SmolLM2-135M, a prompt of {one['prompt_tokens']} tokens): the first event comes after "
            f"{one['first_event_ms']:.0f} ms, the engine's own first token after {one['engine_ms']:.0f}: "
            f"{one['ratio']:.2f} times."
        )
    return [*words, f"{run['machine']['cpu']}, {run['machine']['cores']} cores."]
