// swift-tools-version: 6.0
import PackageDescription

// LPLB_CUDA_OBJECTS: the objects that nvcc made from cuda/*.cu, separated by ':' (setup.py sets it), plus the static CUDA runtime.
// Without it the stub stands in for them and everything runs on the CPU.
let cudaObjects = (Context.environment["LPLB_CUDA_OBJECTS"] ?? "").split(separator: ":").map(String.init)

let package = Package(
    name: "lplb",
    products: [.library(name: "lplb", type: .dynamic, targets: ["LPLB"])],
    targets: [
        .systemLibrary(name: "CLPLB", path: "include"),
        .target(
            name: "CLPLBKernels", path: "cuda", sources: ["stub.c", "exchange_stub.c"], publicHeadersPath: ".",
            cSettings: cudaObjects.isEmpty ? [] : [.define("LPLB_WITH_CUDA")],
            linkerSettings: cudaObjects.isEmpty ? [] : [.unsafeFlags(cudaObjects), .linkedLibrary("stdc++"), .linkedLibrary("rt")]),
        .target(name: "LPLBTopology", dependencies: ["CLPLB"]),
        .target(name: "LPLBPlacement", dependencies: ["LPLBTopology"]),
        .target(name: "LPLBSolver", dependencies: ["LPLBTopology"]),
        .target(name: "LPLB", dependencies: ["LPLBTopology", "LPLBPlacement", "LPLBSolver", "CLPLB", "CLPLBKernels"]),
        .testTarget(name: "LPLBTopologyTests", dependencies: ["LPLBTopology"]),
        .testTarget(name: "LPLBPlacementTests", dependencies: ["LPLBPlacement", "LPLBTopology"]),
        .testTarget(name: "LPLBSolverTests", dependencies: ["LPLBSolver", "LPLBTopology"]),
        .testTarget(name: "LPLBTests", dependencies: ["LPLB", "CLPLB", "CLPLBKernels"]),
    ],
    swiftLanguageModes: [.v6]
)
