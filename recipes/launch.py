"""What every recipe does before it begins: libraries that are quiet where nothing can be done, and all cores."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """
    Silences, each by its name, what libraries say that the user of a recipe can do nothing about.

    Call it before they are imported: some speak as they are.
    """
    # TRL sets this argument of transformers, and the model's flag, by the names they had before.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    # Asks for the package `kernels`, whose kernel serves packed weights. Here weights stay as they train.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    import datasets

    # A bar for each of the dozen steps, of milliseconds, that prepare the rows.
    datasets.disable_progress_bars()


def use_all_cores(training_args) -> None:
    """On a CPU, `accelerate launch` gives a process one thread unless it is told how many."""
    import torch

    if training_args.device.type == "cpu" and training_args.world_size == 1 and torch.get_num_threads() == 1:
        torch.set_num_threads(os.cpu_count() or 1)
