"""Owns the look at the RDMA network cards."""

from __future__ import annotations

from pathlib import Path

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.logged import LoggedWarnings
from deep_ep_core.doctor.machine import Machine

__all__ = ["look_at_network"]

_INFINIBAND_ROOT = Path("/sys/class/infiniband")


def look_at_network(machine: Machine, root: Path = _INFINIBAND_ROOT) -> list[Finding]:
    """A line a card, and which one counts.

    Args:
        machine: The machine.
        root: Folder in which the kernel lists the cards.
    """
    cards = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if not cards:
        text = f"no card in {root}; only ranks on several machines need one"
        return [Finding(name="RDMA", status=Status.NOTE, text=text, facts={"gbs": None, "cards": []})]
    rates = {card: _rate_gbs(card, root) for card in cards}
    findings = []
    for card, rate in rates.items():
        text = "no active port" if rate is None else f"{rate:g} GB/s each way"
        status = Status.NOTE if rate is None else Status.OK
        findings.append(Finding(name=card, status=status, text=text, facts={"gbs": rate}))
    known = {card: rate for card, rate in rates.items() if rate is not None}
    wanted = machine.settings.env.nic_name
    if not known:
        text = "no card has an active port"
        return [*findings, Finding(name="RDMA", status=Status.UNKNOWN, text=text, facts={"gbs": None, "cards": cards})]
    taken = wanted if wanted in known else max(known, key=lambda card: known[card])
    text = f"{known[taken]:g} GB/s is assumed a GPU, that of {taken}"
    if taken != wanted:
        text += f", because {wanted} has no active port (EP_NIC_NAME names another)"
    facts = {"gbs": known[taken], "cards": cards, "card": taken}
    return [*findings, Finding(name="RDMA", status=Status.OK, text=text, facts=facts)]


def _rate_gbs(card: str, root: Path) -> float | None:
    from deep_ep_core.links import rdma_gbs  # imports torch

    with LoggedWarnings("deep_ep_core.links") as logged:
        # Past the cache: what a card lacks is told in the log, once, and the rate is then that of another card.
        rate = rdma_gbs.__wrapped__(card, root=root)
    return None if logged.messages else rate
