"""Arms that a guardrail stops: here, or by the arbiter if that is another member."""

from mlpd.daemon.experiments import Experiments
from mlpd.daemon.peers import Peers
from mlpd.daemon.shared import Shared
from mlpd.experiments.guardrails import Breach

ASK_S = 30.0


class ArmStops:
    """Stops arms for all members; on the loop."""

    def __init__(self, experiments: Experiments, shared: Shared, peers: Peers) -> None:
        self._experiments = experiments
        self._shared = shared
        self._peers = peers

    async def stop(self, name: str, breach: Breach) -> None:
        """Take all traffic from an arm until it has cooled down; durable on return.

        Raises UnavailableError where the arbiter gives no answer: this member's requests don't get
        the arm any more, until it hears of the experiment again.
        """
        arbiter = self._shared.arbiter
        if arbiter is None:
            await self._experiments.stop_arm(name, breach)
            return
        await self._experiments.hold_arm(name, breach)
        fields = {
            "experiment": name,
            "arm": breach.arm,
            "guardrail": breach.guardrail,
            "reason": breach.reason,
        }
        path = "/v1/cluster/stops"
        await self._peers.ask(arbiter.url, "POST", path, fields, timeout_s=ASK_S)
