"""lenspipe: unattended fits of galaxy-galaxy strong lenses, from a catalogue of images to posteriors."""
