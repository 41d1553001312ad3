"""What a layer computes, in the form that is fastest on the device."""
