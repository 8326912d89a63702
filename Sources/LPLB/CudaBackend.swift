// Planning on a GPU.

import CLPLB
import CLPLBKernels
import LPLBTopology

func makeCudaBackend(
    device: Int, solver: Int, shape: ExpertShape, topology: RedundancyTopology?, rank: Int?
) throws(Failure) -> any PlannerBackend {
    throw Failure(LPLB_ERROR_NO_CUDA, "device: must be LPLB_DEVICE_CPU (-1), since this build has no CUDA planner, got \(device)")
}
