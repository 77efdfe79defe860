"""The agent on a device: runs a student, learns from local data, reports to the fleet."""
