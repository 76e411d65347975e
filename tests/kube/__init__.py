"""The far end no test machine has: a Kubernetes API server, KubeRay, Kueue and a kubelet, imitated in this process."""
