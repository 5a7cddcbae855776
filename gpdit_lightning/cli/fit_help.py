"""The help of `fit`, `validate` and `test`: a checked-in text, since their parser imports torch and Lightning.

After an option has changed, `python -m gpdit_lightning.cli.fit_help` writes fit_help.txt again. A test compares the
text with the parser.
"""

import argparse
import re
import textwrap
from pathlib import Path

from jsonargparse import ArgumentParser

from gpdit_lightning.cli.messages import is_offered, literal_choices

HELP = Path(__file__).with_name("fit_help.txt")

HEAD = """usage: python -m gpdit_lightning VERB --config RECIPE [--config OVERLAY ...] [options]

VERB is fit, validate or test. Options override the recipe; `--trainer.max_steps 10` corresponds to the YAML
{trainer: {max_steps: 10}}.
--print_config prints the resolved recipe, and --debug the traceback of an error. `python -m gpdit_lightning recipes`
lists the recipes that ship.
"""

INDENT = " " * 8
TITLES = {
    "trainer.": "Lightning's trainer",
    "model.init_args.backbone.": "Backbone",
    "model.init_args.schedule.": "Noise schedule",
    "model.init_args.optimizer.": "Optimizer",
    "model.init_args.classification.": "Classification (of ClassificationStage)",
    "model": "Stage",
    "data.SOURCE.": "Data sources (SOURCE is images, videos or sequences)",
    "data.": "Data",
    "health.": "Health",
    "ema.": "Average of the weights",
    "preview.": "Previews",
    "scores.": "Scores",
    "checkpoint.": "Checkpoints",
}
# Shown instead of all values that Lightning accepts: ZeRO and FSDP2 refuse others, and pure half precision diverges.
CHOICES = {"trainer.precision": ["32-true", "bf16-mixed", "16-mixed"]}
IN_HEAD = {"help", "config", "print_config", "base"}


def print_help(verb: str) -> None:
    """Print the checked-in help for a verb."""
    print(HELP.read_text(encoding="utf-8").replace("VERB --config", f"{verb} --config", 1))


def rendered() -> str:
    """Return the help, made from the parser of `fit` and the constructor of a stage."""
    from gpdit_lightning.cli.recipe_cli import recipe_parser
    from gpdit_lightning.stages import ClassificationStage

    parser = recipe_parser()
    stage = ArgumentParser()
    stage.add_class_arguments(ClassificationStage, "model.init_args")
    groups = [*parser._action_groups[1:], *stage._action_groups[2:]]
    actions = [action for group in groups for action in group._group_actions if is_shown(action)]
    sections: dict[str, dict[str, None]] = {}  # the options of all sources are equal, and are listed once
    for action in actions:
        name = re.sub(r"^data\.(images|videos|sequences)\.", "data.SOURCE.", action.dest)
        title = next((title for prefix, title in TITLES.items() if name.startswith(prefix)), "Run")
        sections.setdefault(title, {})[paragraph(name, action)] = None
    texts = ("\n".join([f"{title}:", *paragraphs, ""]) for title, paragraphs in sections.items())
    return "\n".join([HEAD, *texts]).rstrip() + "\n"


def is_shown(action: argparse.Action) -> bool:
    """Return whether an action is an option by itself: not hidden, not a whole group, and not explained in HEAD."""
    return is_offered(action) and action.dest not in IN_HEAD


def paragraph(name: str, action: argparse.Action) -> str:
    """Return the help of one option: its name and value, its explanation and its default."""
    choices = CHOICES.get(name) or literal_choices(getattr(action, "_typehint", None))
    value = "{" + ",".join(choices) + "}" if choices else name.split(".")[-1].upper()
    default = action.default
    has_default = isinstance(default, bool | int | float | str) and default != ""
    explanation = re.sub(r" Default: ``.*?``\.?", "", " ".join((action.help or "").split())).replace("``", "'")
    explanation = explanation[:1].upper() + explanation[1:]
    shown = str(default).lower() if isinstance(default, bool) else default
    explanation += f" (default: {shown})" if has_default else ""
    text = textwrap.fill(explanation, 110, initial_indent=INDENT, subsequent_indent=INDENT)
    return f"  --{name} {value}" + (f"\n{text}" if explanation else "")


if __name__ == "__main__":
    HELP.write_text(rendered(), encoding="utf-8")
