"""Installing one of the system's packages, where that may be done, and saying so first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_LOCK = ("-o", "DPkg::Lock::Timeout=120")  # a new machine may be installing its updates
_POLICY = Path("/usr/sbin/policy-rc.d")


def may_install() -> bool:
    """Tell whether packages can be installed here without asking for a password."""
    if shutil.which("apt-get") is None:
        return False
    if os.geteuid() == 0:
        return True
    sudo = shutil.which("sudo")
    return sudo is not None and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0


def install(package: str) -> bool:
    """Install a package without letting it start a service of the system; tells whether that worked."""
    print(f"{package} is not on this machine: installing the system's package", file=sys.stderr, flush=True)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    is_ours = not _POLICY.exists()
    if is_ours:  # Debian's own way to say that installing must not start anything
        _run([*sudo, "sh", "-c", f"printf '#!/bin/sh\\nexit 101\\n' >{_POLICY} && chmod 755 {_POLICY}"])
    try:
        environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
        _run([*sudo, *environment, "apt-get", "-qq", *_LOCK, "update"])
        return _run([*sudo, *environment, "apt-get", "-qq", *_LOCK, "install", "--no-install-recommends", package])
    finally:
        if is_ours:
            _run([*sudo, "rm", "-f", str(_POLICY)])


def _run(command: list[str]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr.strip()[-2000:], file=sys.stderr)
    return done.returncode == 0
