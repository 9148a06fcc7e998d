"""A plan as a systemd unit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import DoesNotFitError, PackageError, UsageError
from turbofit.core.messages import plural

if TYPE_CHECKING:
    from turbofit.launch.export.service import Service

__all__ = ["systemd_unit"]

#: Exit codes after which another start would not help.
_FINAL: Final = (UsageError, DoesNotFitError, PackageError)
_BACKOFF: Final = 10

#: A word without quotes, and what a backslash stands before within them.
_PLAIN: Final = re.compile(r"[\w@%+=:,./$-]+", re.ASCII)
_ESCAPED: Final = {"\\": "\\\\", '"': '\\"'}

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
{more}EnvironmentFile={may_lack}/etc/turbofit/{name}.env
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
    argv, more = (executable, *service.argv[1:]), {}
    if service.uuids:
        more["CUDA_VISIBLE_DEVICES"] = ",".join(service.uuids)
    if service.hub_cache:
        more["HF_HUB_CACHE"] = service.hub_cache
    return _UNIT.format(
        name=service.name,
        gpus=f"{service.gpus} {plural(service.gpus, 'GPU')}",
        card=service.card,
        model=" ".join(service.argv[2].split()).rstrip("\\").replace("%", "%%"),
        command=" ".join(_word(word).replace("$", "$$") for word in argv),
        more="".join(f"Environment={_word(f'{name}={value}')}\n" for name, value in more.items()),
        may_lack="" if service.needs_keys else "-",
        backoff=_BACKOFF,
        final=" ".join(str(error.exit_code) for error in _FINAL),
        stop=service.stop,
    )


def _word(text: str) -> str:
    """One word as systemd reads it: a quote opens at a word's beginning and closes at its end."""
    text = text.replace("%", "%%")
    if _PLAIN.fullmatch(text):
        return text
    signs = (_ESCAPED.get(sign) or (sign if sign.isprintable() else _code(sign)) for sign in text)
    return f'"{"".join(signs)}"'


def _code(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))
