"""`fastff experiment ...`: studies of several variants of a model."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.experiment import study_settings


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def pretrain(settings: study_settings.PlanSettings) -> int:
    """Pretrain the variants of a plan and compare them in a table and charts.

    Run the same command again to resume.
    """
    from fastff.experiment import variants

    variants.run(settings, say=_say)
    return 0


def glue(settings: study_settings.GlueVariantsSettings) -> int:
    """Fine-tune pretrained variants on GLUE and say how much of the dense scores each keeps.

    Run the same command again to resume.
    """
    from fastff.experiment import glue_variants

    glue_variants.run(settings, say=_say)
    return 0


def redraw(settings: study_settings.RedrawSettings) -> int:
    """Make the tables and charts of records.json or glue.json again, without running anything."""
    from fastff.experiment import glue_variants, variants

    if (settings.out / glue_variants.SCORES).is_file():
        glue_variants.redraw(settings.out, say=_say)
    else:
        variants.redraw(settings.out, settings.plan, say=_say)
    return 0


def gpu_speed(settings: study_settings.SpeedSettings) -> int:
    """Measure tokens a second of pretraining on one GPU and on several, with DDP and with FSDP2."""
    from fastff.experiment import gpu_speed

    failed = gpu_speed.run(settings, say=_say)
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def frontier(settings: study_settings.FrontierSettings) -> int:
    """Put the held-out losses of studies beside the measured speed of their models, in a table and a chart."""
    from fastff.experiment import frontier

    frontier.run(settings, say=_say)
    return 0


def warm_start(settings: study_settings.WarmStartSettings) -> int:
    """Turn the feedforwards of a pretrained dense model into trees, or narrow layers, to start from."""
    from fastff.experiment import warm_start

    _say("unexplained " + " ".join(f"{share:.3f}" for share in warm_start.run(settings)))
    return 0


def pack_tokens(settings: study_settings.PackSettings) -> int:
    """Pack tokenised text into a file, about a byte a token, for a machine without the text."""
    from fastff.experiment import pack_tokens

    pack_tokens.pack(settings.data, settings.target, most=settings.most, say=_say)
    return 0


def unpack_tokens(settings: study_settings.UnpackSettings) -> int:
    """Unpack tokenised text as train, and its held-out part as valid."""
    from fastff.experiment import pack_tokens

    pack_tokens.unpack(settings.source, settings.data, say=_say)
    return 0
