"""What is done once Axolotl has saved the adapter: its model card, and how to measure it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.utils.logging import get_logger

from ...adapters.publishing import renew_card as renew_card_of_folder
from ...evaluation.command_line import how_to_evaluate
from ...models.loading import LoadingOptions

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

LOG = get_logger(__name__)


def renew_card(cfg: DictDefault) -> None:
    """Put our part into the README.md that Axolotl has written over the one with it."""
    try:
        renew_card_of_folder(cfg.output_dir)
    except (ValueError, OSError) as error:  # a remark on the card must not end a run that is through
        LOG.warning(f"The model card says nothing of the safety module: {error}")


def say_how_to_evaluate(cfg: DictDefault) -> None:
    """Print the command for the model just trained, where it is one that answers."""
    if cfg.reward_model or cfg.process_reward_model:
        return
    loading = LoadingOptions(
        load_in_4bit=bool(cfg.load_in_4bit),
        load_in_8bit=bool(cfg.load_in_8bit),
        revision=cfg.revision_of_model,
        trust_remote_code=bool(cfg.trust_remote_code),
    )
    print(how_to_evaluate(cfg.base_model, cfg.output_dir, loading), flush=True)
