"""A run on a cluster of somebody's: what it needs there (nodes, places), manifests (render), jobs (submit), health (doctor)."""
