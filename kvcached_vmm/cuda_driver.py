"""Virtual memory management of one NVIDIA GPU. The only module that imports cuda.bindings."""

from __future__ import annotations

import threading
import uuid
from typing import Any

from kvcached_vmm.driver import DeviceMemory
from kvcached_vmm.errors import DeviceUnsupported, DriverError, OutOfMemory

MINIMUM_CAPABILITY = (8, 0)
"""Ampere: older GPUs fault when pages are mapped beside running kernels (kvcached #465)."""


class CudaDriver:
    """Driver of the GPU that CUDA calls ``ordinal`` in this process.

    Raises:
        DeviceUnsupported: no driver, no such GPU, or one that we do not support.
    """

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise DeviceUnsupported(
                "cuda-python is not installed, so GPU memory cannot be mapped; "
                "install it with: pip install 'kvcached-plugins[vllm]'."
            ) from error
        self._cuda: Any = cuda
        self._success = cuda.CUresult.CUDA_SUCCESS
        self._cu_create, self._cu_map = cuda.cuMemCreate, cuda.cuMemMap
        self._cu_unmap, self._cu_release = cuda.cuMemUnmap, cuda.cuMemRelease
        self._entered = threading.local()
        try:
            self._open(ordinal)
        except (DriverError, RuntimeError) as error:
            raise DeviceUnsupported(
                f"GPU {ordinal} cannot be used: {str(error).rstrip('.')}; check that the NVIDIA "
                "driver is installed and that CUDA_VISIBLE_DEVICES names a GPU of this machine."
            ) from error

    def _open(self, ordinal: int) -> None:
        cuda = self._cuda
        self._call("cuInit", 0)
        self._gpu = self._call("cuDeviceGet", ordinal)
        attribute = cuda.CUdevice_attribute
        capability = (
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        if capability < MINIMUM_CAPABILITY:
            raise DeviceUnsupported(
                f"GPU {ordinal} has compute capability {capability[0]}.{capability[1]}; an elastic "
                "KV cache needs an Ampere GPU (8.0) or newer; unset ENABLE_KVCACHED to run it."
            )
        if not self._attribute(attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED):
            raise DeviceUnsupported(
                f"GPU {ordinal} or its driver cannot map virtual memory, which an elastic KV cache "
                "needs; unset ENABLE_KVCACHED to run it."
            )
        number = uuid.UUID(bytes=bytes(self._call("cuDeviceGetUuid", self._gpu).bytes))
        self.device = f"GPU-{number}"
        self._context = self._call("cuDevicePrimaryCtxRetain", self._gpu)
        location = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties = cuda.CUmemAllocationProp()
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = location
        self._properties.location.id = ordinal
        self._access = cuda.CUmemAccessDesc()
        self._access.location.type = location
        self._access.location.id = ordinal
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(
            self._call("cuMemGetAllocationGranularity", self._properties, minimum)
        )

    def reserve(self, size: int) -> int:
        self._enter()
        nowhere = self._cuda.CUdeviceptr(0)
        return int(self._call("cuMemAddressReserve", size, self.granularity, nowhere, 0))

    def free(self, address: int, size: int) -> None:
        self._enter()
        self._call("cuMemAddressFree", address, size)

    def create(self, size: int) -> Any:
        self._enter()
        status, handle = self._cu_create(size, self._properties, 0)
        if status != self._success:
            raise self._error("cuMemCreate", status)
        return handle

    def map(self, address: int, size: int, handle: Any) -> None:
        (status,) = self._cu_map(address, size, 0, handle, 0)
        if status != self._success:
            raise self._error("cuMemMap", status)

    def allow(self, address: int, size: int) -> None:
        self._call("cuMemSetAccess", address, size, [self._access], 1)

    def unmap(self, address: int, size: int) -> None:
        self._enter()
        (status,) = self._cu_unmap(address, size)
        if status != self._success:
            raise self._error("cuMemUnmap", status)

    def release(self, handle: Any) -> None:
        (status,) = self._cu_release(handle)
        if status != self._success:
            raise self._error("cuMemRelease", status)

    def memory(self) -> DeviceMemory:
        self._enter()
        free, total = self._call("cuMemGetInfo")
        return DeviceMemory(int(free), int(total))

    def _enter(self) -> None:
        """Make the GPU's primary context current; each thread needs it once."""
        if not getattr(self._entered, "done", False):
            self._call("cuCtxSetCurrent", self._context)
            self._entered.done = True

    def _attribute(self, attribute: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", attribute, self._gpu))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._success:
            raise self._error(name, status)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, name: str, status: Any) -> DriverError:
        short = status == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        return (OutOfMemory if short else DriverError)(name, status.name)
