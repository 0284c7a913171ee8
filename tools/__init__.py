"""What a user runs beside the method: prepare clips, convert trajectories, evaluate a folder, measure speed."""
