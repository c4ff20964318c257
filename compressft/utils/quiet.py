"""Libraries' own words, of which a run's display takes the place."""


def quiet_libraries() -> None:
    """transformers' own bars and loading tables would hide ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
