"""A CUDA device that is not there: what a GPU would refuse raises, what makes the host wait counts.

    with simulated_cuda() as device:
        model.to("cuda")
        model(x.to("cuda"))
    assert not device.waits

Values are computed on the CPU, so that results equal the CPU's bit for bit. Kernels (Triton), CUDA
graphs, streams and `torch.compile` are not simulated.
"""

from tests.simulated.counts import Counts
from tests.simulated.device import SimulatedDevice, simulated_cuda
from tests.simulated.tensors import MixedDevicesError, SimulatedTensor

__all__ = ["Counts", "MixedDevicesError", "SimulatedDevice", "SimulatedTensor", "simulated_cuda"]
