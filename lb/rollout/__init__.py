"""The deployer's side: plans, journal, stores, and how hosts and balancers are reached."""
