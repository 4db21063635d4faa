"""Find out which shard this process works on; `examples.in_shard` defines what belongs to a shard."""

from __future__ import annotations

from collections.abc import Mapping

from config.errors import UserError
from config.settings import ShardSettings


def resolve_shard(settings: ShardSettings, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (index, count) of the shard: from the settings, else from Slurm's array variables, else all of it.

    `--array=1-10` makes shards 0 to 9 of 10. If `shard.count` differs from the size of the array (to rerun some tasks:
    `--array=3,7 ... shard.count=10`), the task's number is the index itself.

    Raises:
        UserError: The index is missing or out of range.
    """
    array = {
        name: int(environment[f"SLURM_ARRAY_TASK_{name}"])
        for name in ("ID", "COUNT", "MIN", "STEP")
        if environment.get(f"SLURM_ARRAY_TASK_{name}", "").isdigit()
    }
    count = settings.count if settings.count is not None else array.get("COUNT", 1)
    index = settings.index
    if index is None and "ID" in array:
        whole_array = count == array.get("COUNT", count)
        index = (array["ID"] - array.get("MIN", 0)) // array.get("STEP", 1) if whole_array else array["ID"]
    if index is None and count > 1:
        raise UserError(f"shard.count={count}: which of the shards? Give shard.index=0 to {count - 1}")
    if not 0 <= (index or 0) < count:
        raise UserError(
            f"shard.index={index} is out of range: of {count} shard{'s' * (count > 1)} the indices are 0 to {count - 1}"
            + ("; give shard.count too" if settings.count is None else "")
        )
    return index or 0, count
