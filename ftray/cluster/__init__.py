"""Ray clusters and Kubernetes: job submission, health checks, manifests, network test."""
