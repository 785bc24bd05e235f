"""earlybird in the training loops that users have, one file a framework; a bare loop and Fabric need none."""
