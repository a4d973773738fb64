// Where one step's results become the next one's input, without a detour over the host.
//
// tokens [*tokenCount] holds token ids, or -1 - i for the token that pair i of the step before sampled: the host plans a step while
// the one before still runs, and does not know it yet. lastToken [pairs] is what sampling leaves (sampling.cu).
// Launch: grid ceil(tokens / 256), 256 threads.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) resolveTokens(int* tokens, const int* lastToken, const int* tokenCount) {
    followPredecessor();
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i < *tokenCount && tokens[i] < 0) {
        tokens[i] = lastToken[-1 - tokens[i]];
    }
}
