// The kernels of this build, and their errors as failures.

import CLPLB
import CLPLBKernels

/// The table of functions of cuda/kernels.h; throws in a build without CUDA.
func cudaKernels(_ doing: @autoclosure () -> String) throws(Failure) -> lplbk_backend {
    guard let cuda = lplbk_cuda() else { throw withoutCuda(doing(), "built without CUDA") }
    return cuda.pointee
}

/// Throws what a function of the kernels returned.
@inline(__always)
func check(_ error: Int32, _ doing: @autoclosure () -> String) throws(Failure) {
    if error != 0 { throw cudaFailure(error, doing()) }
}

func cudaFailure(_ error: Int32, _ doing: String) -> Failure {
    guard let cuda = lplbk_cuda()?.pointee else { return withoutCuda(doing, "built without CUDA") }
    let name = String(cString: cuda.error_name(error))
    switch Int(cuda.error_kind(error)) {
    case LPLBK_KIND_NO_CUDA: return withoutCuda(doing, name + likelyCause(of: name, cuda))
    case LPLBK_KIND_OUT_OF_MEMORY: return Failure(LPLB_ERROR_OUT_OF_MEMORY, "\(doing): \(name)")
    case LPLBK_KIND_UNSUPPORTED:
        return Failure(LPLB_ERROR_UNSUPPORTED, "\(doing): must be within what the kernels can do on this device, got \(name)")
    default: return Failure(LPLB_ERROR_CUDA, "\(doing): \(name)")
    }
}

/// What mostly is behind an error that says that a machine cannot be used, "" where nobody knows.
private func likelyCause(of name: String, _ cuda: lplbk_backend) -> String {
    switch name {
    case "cudaErrorInsufficientDriver":
        ": no driver here, or one that is older than CUDA \(cuda.version / 1000).\(cuda.version % 1000 / 10) of this build"
    case "cudaErrorNoKernelImageForDevice": ": this build has kernels for \(String(cString: cuda.architectures))"
    case "cudaErrorInitializationError": ": as in a process that was forked after CUDA was used"
    default: ""
    }
}

private func withoutCuda(_ doing: String, _ why: String) -> Failure {
    Failure(LPLB_ERROR_NO_CUDA, "\(doing): CUDA cannot be used here (\(why)); LPLB_DEVICE_CPU (-1) plans on the host")
}
