"""The lens catalogue: mocks and observed lenses in one format, checked before anything is fitted."""
