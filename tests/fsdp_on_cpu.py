"""Runs a stage under FSDP2 on CPU processes, which Accelerate would leave unsharded and the stages therefore refuse.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml tests/fsdp_on_cpu.py stages/ppo.py ...

Accelerate makes FSDP of several GPU processes only; it is told that these are such.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.state import DistributedType

start = PartialState.__init__


def started(self: PartialState, *arguments: object, **named: object) -> None:
    start(self, *arguments, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = started  # type: ignore[method-assign]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
