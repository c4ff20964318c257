"""How the rows of a step are shared out, so that a run may go on with another number of processes."""

from __future__ import annotations

from compressft.errors import UserError
from compressft.recipe.parts import TrainConfig


def shared_out(config: TrainConfig, begun: int, now: int) -> TrainConfig:
    """The settings with which each of `now` processes trains what `begun` ones would have.

    A step has the rows that it had: each process takes more or fewer of them, never more at once than the recipe says.

    Raises:
        UserError: they cannot be shared evenly.
    """
    rows = config.batch_size * begun
    if rows % now:
        fits = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise UserError(
            f"--resume: the run began with {begun} processes, and {now} cannot share the {rows} rows of a batch; "
            f"go on with {', '.join(fits)}"
        )
    each = rows // now
    times = next(k for k in range(1, each + 1) if each % k == 0 and each // k <= config.batch_size)
    return config.model_copy(
        update={"batch_size": each // times, "gradient_accumulation": config.gradient_accumulation * times}
    )
