"""Elastic memory for block pools: a reserved virtual range whose extents come and go.

``Driver`` is the seam to memory, ``Arena`` the range, ``ElasticPool`` the policy that says which
blocks to hand out and which extents to give back, ``Ledger`` the record that processes share.
"""

from kvcached_vmm.account import Account
from kvcached_vmm.arena import Arena
from kvcached_vmm.driver import DeviceMemory, Driver
from kvcached_vmm.errors import DriverError, KVCachedError, LedgerError, OutOfMemory
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.fence import Quarantine, StepClock
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import ElasticPool

__all__ = [
    "Account",
    "Arena",
    "DeviceMemory",
    "Driver",
    "DriverError",
    "ElasticPool",
    "ExtentMap",
    "HostDriver",
    "KVCachedError",
    "Ledger",
    "LedgerError",
    "OutOfMemory",
    "Policy",
    "Quarantine",
    "Region",
    "StepClock",
]
