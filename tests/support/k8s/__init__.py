"""
A Kubernetes cluster to test with: an API server and kubelets that answer as real ones do.

What they say was recorded from a real 1.20.2; `tests/contract/test_kubernetes_facts.py` holds
those facts and runs against a real cluster too.  `cluster.FakeCluster` is where to begin.
"""
