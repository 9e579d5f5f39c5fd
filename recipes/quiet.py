"""Silences, each by its name, what libraries say that the user of a recipe can do nothing about."""

import logging
import warnings


def quiet_libraries() -> None:
    """Call it before the libraries are imported: some speak as they are."""
    # TRL sets this argument of transformers, and the model's flag, by the names they had before.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    # Asks for the package `kernels`, whose kernel serves packed weights. Here weights stay as they train.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    import datasets

    # A bar for each of the dozen steps, of milliseconds, that prepare the rows.
    datasets.disable_progress_bars()
