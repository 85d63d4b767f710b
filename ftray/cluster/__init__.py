"""A run on a cluster of somebody's: what it needs there (nodes, places, room), manifests (pods, render), jobs (jobs,
submit), health (doctor)."""
