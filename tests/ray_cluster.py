"""A real Ray cluster of two nodes on this machine: prints its address, kills the second node when told to.

Run as a program, so that nothing of Ray stays in the process of the tests: ``python tests/ray_cluster.py``. It answers
``kill`` on its standard input with ``killed`` and ends when the input is closed.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1, include_dashboard=False)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(second, allow_graceful=False)
            print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
