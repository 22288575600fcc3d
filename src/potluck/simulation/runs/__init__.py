"""Run directories, their manifests, and reports."""
