"""What the activity pipeline does, done by other engines; README.md tells how and what differs."""
