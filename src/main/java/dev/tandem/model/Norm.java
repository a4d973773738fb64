package dev.tandem.model;

/** The kind of normalisation between a decoder's blocks. */
public enum Norm {
    /** Root mean square, no mean taken off, no bias (Zhang and Sennrich, 2019). */
    RMS,
    /** Mean and variance, with weight and bias (Ba et al., 2016). */
    LAYER
}
