"""The methods: one file each, all behind `diffora.methods.base.Method`."""
