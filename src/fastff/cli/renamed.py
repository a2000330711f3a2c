"""Options that have a new name. The old one works for one version, with a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

RENAMED: dict[str, dict[str, str]] = {
    "bench": {"--anew": "--replace"},
    "convert": {"--mild": "--dense-fade", "--controls": "--baselines"},
    "glue": {"--rate": "--lr", "--layer-rate": "--layer-lr-scale"},
    "pretrain": {
        "--rate": "--lr",
        "--length": "--seq-len",
        "--warm-up": "--warmup",
        "--start": "--init-from",
        "--sharded": "--fsdp",
        "--piece-seconds": "--max-run-seconds",
        "--layer": "--layer-option",
    },
}


def current_names(words: Sequence[str], warn: Callable[[str], object]) -> list[str]:
    """A command line with the names that options have now; `warn` is told of every old one."""
    command = words[0] if words else ""
    names = dict(RENAMED.get(command, {}))
    if command == "bench":
        names["--seconds"] = "--max-run-seconds" if _device(words) == "cuda" else "--cell-seconds"
    return list(_renamed(words, names, warn))


def _renamed(words: Sequence[str], names: Mapping[str, str], warn: Callable[[str], object]) -> Iterator[str]:
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            warn(f"{name} is now {names[name]}; the old name will be removed in the next version")
            yield names[name] + equals + value
        else:
            yield word


def _device(words: Sequence[str]) -> str:
    """The device that a command line of `bench` names."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--device":
            return following
        if word.startswith("--device="):
            return word.partition("=")[2]
    return "cpu"
