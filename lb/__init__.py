"""A TCP balancer that runs as a service of handoff: relays, health checks, dynamic configuration."""
