"""A pretended GPU: with a CPU alone, PyTorch behaves as if there were a CUDA device.

    with pretend_gpu.on():          # in a test; on(bf16=False): a chip like the T4
        model.to("cuda")
    python tests/pretend_gpu.py 04  # run a page on it from top to bottom; nothing is saved

The numbers are real: a tensor of the device holds a CPU tensor out of sight, and each operation
computes with that one. What CUDA refuses is refused in its words: tensors of two devices in one
operation (a single number of the CPU may join, CPU indices may index), numpy, random numbers by
a CPU's generator. Not here: torch.compile (gives back what it gets); speed; CUDA's rounding."""

import functools
import os
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU, CUDA, META, aten = *map(torch.device, ("cpu", "cuda:0", "meta")), torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# The device's own random numbers; whether "meta" means the device in the call that is under way.
now = {"rng": torch.Generator().get_state(), "meta is cuda": False}
is_composite = functools.cache(torch._C._dispatch_has_kernel_for_dispatch_key)
generators = {}  # the pretended ones by address: operations get another Python object
# Of what CUDA's autocast computes with few digits, and with all, what a model uses.
FEW = {F.linear, F.scaled_dot_product_attention, torch.Tensor.matmul, torch.Tensor.__matmul__}
ALL = {F.cross_entropy, F.layer_norm, torch.Tensor.softmax}


class GPUTensor(torch.Tensor):
    """A tensor of the pretended device. To PyTorch's C++ it is on "meta", which needs no driver,
    but with CUDA's dispatch keys, so that autograd takes its way for CUDA."""
    @staticmethod
    def __new__(cls, held):
        with torch.inference_mode(held.is_inference()):  # a view of a normal tensor is normal
            shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device=META)
            self = torch.Tensor._make_subclass(cls, shape, device_for_backend_keys=CUDA)
        self.held = held.detach() if held.requires_grad else held
        return self

    device, is_cuda, is_cpu, is_meta = (
        property(lambda self, value=value: value) for value in (CUDA, True, False, False))
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __reduce_ex__(self, protocol):
        return (torch._utils._rebuild_device_tensor_from_cpu_tensor,  # it minds map_location
                (self.held, self.dtype, "cuda:0", self.requires_grad))

    def __repr__(self, **kwargs):
        return f"{repr(self.held)[:-1]}, device='cuda:0')"

    def __format__(self, spec):
        return format(self.held, spec)

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")

    __array__ = numpy


def is_gpu(value):
    return isinstance(value, GPUTensor)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.place = torch.device(device)
        generators[self._cdata] = self

    device = property(lambda self: self.place)


def tensors(*values):
    """The tensors among the values and in their lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(*value)


def check(func, args, kwargs, place):
    """Raise what CUDA raises where tensors, or a generator, are of two devices."""
    if func in INDEXING and place == CUDA:
        if not is_gpu(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               "indexed tensor (cpu)")
        args = [args[0], *args[2:]]
    moves = func in COPIES or kwargs.get("device") is not None
    others = [t for t in tensors(*args, *kwargs.values()) if not is_gpu(t) and t.dim()]
    if place == CUDA and not moves and others:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, cuda:0 and cpu! ({func})")
    generator = kwargs.get("generator")
    home = generators.get(generator._cdata, generator).device if generator else place
    if home.type != place.type:
        raise RuntimeError(f"Expected a '{place.type}' device type for generator but found "
                           f"'{home.type}'")


def compute(func, args, kwargs):
    """Do one operation of PyTorch with what its tensors hold; the result is where it belongs."""
    inputs = [t for t in tensors(*args, *kwargs.values()) if is_gpu(t)]
    place = CUDA if inputs and (func not in COPIES or is_gpu(next(tensors(args[0])))) else CPU
    if kwargs.get("device") is not None:  # it makes a tensor, or copies to another device
        place = torch.device(kwargs["device"])
        if place.type == "cuda" or place == META and now["meta is cuda"]:
            place, kwargs = CUDA, kwargs | {"device": CPU}
    check(func, args, kwargs, place)
    known = {id(t.held): t for t in inputs}  # an operation in place gives its tensor back
    args, kwargs = tree_map_only(GPUTensor, lambda t: t.held, (args, kwargs))
    if own := place == CUDA and torch.Tag.nondeterministic_seeded in func.tags:
        before, _ = torch.get_rng_state(), torch.set_rng_state(now["rng"])
    out = func(*args, **kwargs)
    if own:
        now["rng"], _ = torch.get_rng_state(), torch.set_rng_state(before)
    if place != CUDA:
        return out
    return tree_map_only(torch.Tensor,
                         lambda t: known[id(t)] if id(t) in known else GPUTensor(t), out)


class Operations(TorchDispatchMode):
    """Sees each operation, also one without a tensor of the device: torch.zeros(device="cuda")."""
    _should_skip_dynamo = classmethod(lambda cls: False)  # a wrapper less, which takes most time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not is_composite(func.name(), "CompositeImplicitAutograd"):
            return compute(func, args, kwargs or {})
        with self:  # in inference_mode an operation made of others arrives whole
            return func.decompose(*args, **kwargs or {})


class Calls(TorchFunctionMode):
    """Sees each call first, and mends what C++ would do with a tensor "on meta"."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs, before = list(args), kwargs or {}, now["meta is cuda"]
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, [args[0], CUDA]
        stays = func is torch.Tensor.to and is_gpu(args[0])

        def number(value):  # without a driver PyTorch cannot ask which one "cuda" is
            asked = isinstance(value, (str, torch.device)) and str(value)[:4] == "cuda"
            return (META if stays else CUDA) if asked else value

        if func is torch.Tensor.to:
            args = [number(value) for value in args]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args[1] = tuple(torch.tensor(i, dtype=None if i else torch.long)
                            if isinstance(i, list) else i for i in index)
        kwargs = {name: number(value) for name, value in kwargs.items()}
        if func in FEW | ALL and torch.is_autocast_enabled("cuda"):  # C++ does it by the device
            dtype = torch.get_autocast_dtype("cuda") if func in FEW else torch.float32
            args = [a.to(dtype) if is_gpu(a) and a.is_floating_point() else a for a in args]
        if func is torch.tensor and isinstance(args[0], list):  # of the device's numbers
            args = tree_map_only(GPUTensor, lambda t: t.held, args)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            return func(*args, **kwargs | {"device": CPU}).to(CUDA)
        try:
            now["meta is cuda"] |= any(map(is_gpu, tensors(*args, *kwargs.values())))
            return func(*args, **kwargs)
        finally:
            now["meta is cuda"] = before


@contextmanager
def on(bf16=True):
    """Pretend inside a `with` block. bf16: whether the chip computes with bfloat16 by itself."""
    seed = lambda n: now.update(rng=torch.Generator().manual_seed(n).get_state())  # noqa: E731
    patches = dict(
        is_available=lambda: True, is_initialized=lambda: True, _lazy_init=lambda: None,
        device_count=lambda: 1, current_device=lambda: 0, synchronize=lambda device=None: None,
        manual_seed=seed, manual_seed_all=seed, get_device_name=lambda device=None: "pretended",
        get_device_capability=lambda device=None: (8, 0) if bf16 else (7, 5),
        is_bf16_supported=lambda including_emulation=True: bf16 or including_emulation,
        get_rng_state=lambda device="cuda": now["rng"].clone(),
        set_rng_state=lambda new, device="cuda": now.update(rng=new.clone()))
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in dir(torch.optim.Optimizer):  # they ask the driver about graphs
            if name.endswith("graph_capture_health_check"):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "compile", lambda model, **settings: model))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(generators.clear)
        swap = torch.__future__.set_swap_module_params_on_conversion  # Module.to changes the class
        stack.callback(swap, torch.__future__.get_swap_module_params_on_conversion())
        swap(True)
        stack.enter_context(Calls())
        stack.enter_context(Operations())
        yield


def run_page(path):
    """Run the page's code cells with the device on; return what stopped it, or None."""
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance(colors="nocolor")
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent.parent))
    with on():
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code" and not shell.run_cell(cell.source).success:
                return f"{path.stem} stops at the cell {cell.id}"


if __name__ == "__main__":
    import pages
    os.environ["MPLBACKEND"] = "agg"
    sys.exit(run_page(*pages.find_pages(sys.argv[1:])))
