"""The fleet server: takes in reports, merges what devices learned, steers rollouts."""
