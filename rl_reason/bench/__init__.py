"""Measuring the loop: work counted from shapes, timings that wait for the device, and a host loop to compare with."""
