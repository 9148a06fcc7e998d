"""A plan as a systemd unit."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import DoesNotFitError, PackageError, UsageError
from turbofit.core.messages import plural

if TYPE_CHECKING:
    from turbofit.launch.export.service import Service

__all__ = ["systemd_unit"]

#: What another start would not mend.
_FINAL: Final = (UsageError, DoesNotFitError, PackageError)
_BACKOFF: Final = 10

_UNIT: Final = """\
# Written by `turbofit export systemd`. Save it as /etc/systemd/system/{name}.service, then:
#   systemctl daemon-reload && systemctl enable --now {name}
# Keys that clients must send stand in /etc/turbofit/{name}.env:
#   TURBOFIT_API_KEYS=KEY[,KEY]
# Planned for {gpus}: {card}. It measures and plans again at every start.
[Unit]
Description=turbofit: {model}
Wants=network-online.target
After=network-online.target nvidia-persistenced.service
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
Environment=PYTHONUNBUFFERED=1 CUDA_DEVICE_ORDER=PCI_BUS_ID XDG_STATE_HOME=/var/lib/{name}
{visible}EnvironmentFile=-/etc/turbofit/{name}.env
StateDirectory={name}
Restart=on-failure
RestartSec={backoff}
RestartPreventExitStatus={final}
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec={stop}
LimitMEMLOCK=infinity
LimitNOFILE=65536
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def systemd_unit(service: Service, *, executable: str) -> str:
    """The unit's text.

    Args:
        service: what to run.
        executable: the absolute path of ``turbofit`` on that machine.
    """
    visible = ""
    if service.uuids:
        visible = f"Environment=CUDA_VISIBLE_DEVICES={','.join(service.uuids)}\n"
    return _UNIT.format(
        name=service.name,
        gpus=f"{service.gpus} {plural(service.gpus, 'GPU')}",
        card=service.card,
        model=service.argv[2].replace("%", "%%"),
        command=_command((executable, *service.argv[1:])),
        visible=visible,
        backoff=_BACKOFF,
        final=" ".join(str(error.exit_code) for error in _FINAL),
        stop=service.stop,
    )


def _command(argv: tuple[str, ...]) -> str:
    """As ExecStart reads it: % and $ are systemd's own."""
    return " ".join(shlex.quote(word).replace("%", "%%").replace("$", "$$") for word in argv)
