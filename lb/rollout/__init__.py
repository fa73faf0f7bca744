"""Rollouts over many hosts: a plan, a journal, stores, and the way to hosts and balancers."""
