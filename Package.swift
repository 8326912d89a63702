// swift-tools-version: 6.0
import PackageDescription

// LPLB_CUDA_OBJECTS: the objects that nvcc made from cuda/*.cu, separated by ':' (setup.py sets it), plus the static CUDA runtime.
// Without it everything runs on the CPU.
let cudaObjects = (Context.environment["LPLB_CUDA_OBJECTS"] ?? "").split(separator: ":").map(String.init)

let package = Package(
    name: "lplb",
    products: [.library(name: "lplb", type: .dynamic, targets: ["LPLB"])],
    targets: [
        .systemLibrary(name: "CLPLB", path: "include"),
        .systemLibrary(name: "CLPLBKernels", path: "cuda"),
        .target(name: "LPLBTopology", dependencies: ["CLPLB"]),
        .target(name: "LPLBPlacement", dependencies: ["LPLBTopology", "LPLBSolver"]),
        .target(name: "LPLBSolver", dependencies: ["LPLBTopology"]),
        .target(name: "LPLBReplicas", dependencies: ["LPLBPlacement", "LPLBTopology"]),
        .target(
            name: "LPLB", dependencies: ["LPLBTopology", "LPLBPlacement", "LPLBReplicas", "LPLBSolver", "CLPLB", "CLPLBKernels"],
            linkerSettings: cudaObjects.isEmpty ? [] : [.unsafeFlags(cudaObjects), .linkedLibrary("stdc++"), .linkedLibrary("rt")]),
        .testTarget(name: "LPLBTopologyTests", dependencies: ["LPLBTopology"]),
        .testTarget(name: "LPLBPlacementTests", dependencies: ["LPLBPlacement", "LPLBSolver", "LPLBTopology"]),
        .testTarget(name: "LPLBSolverTests", dependencies: ["LPLBSolver", "LPLBTopology"]),
        .testTarget(name: "LPLBReplicasTests", dependencies: ["LPLBReplicas", "LPLBTopology"]),
        .testTarget(name: "LPLBTests", dependencies: ["LPLB", "CLPLB", "CLPLBKernels"]),
    ],
    swiftLanguageModes: [.v6]
)
