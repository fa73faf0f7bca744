"""What runs on a host: `handoff host`, commands that outlive the session which asked for them."""
