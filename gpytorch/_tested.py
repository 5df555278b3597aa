"""Digests of the sources of what the overlay replaces or stands for, in the releases that were tested.

Written by ``python test/overlay/record_sources.py``.
"""

SOURCES: dict[str, list[str]] = {
    "gpytorch.constraints.constraints:GreaterThan.transform": ["6a28f3d111684a88"],
    "gpytorch.constraints.constraints:Interval.transform": ["e22c5792b3a6f3b7"],
    "gpytorch.constraints.constraints:LessThan.transform": ["55cbd58b622050bd"],
    "gpytorch.constraints.constraints:Positive.transform": ["e71ddb2d861ef8a9"],
    "gpytorch.distributions.multivariate_normal:MultivariateNormal.__init__": ["6da68eb3e05d7fbc", "968e6854c5622b61"],
    "gpytorch.distributions.multivariate_normal:MultivariateNormal.log_prob": ["3a4d17b7f1bac66f"],
    "gpytorch.kernels.constant_kernel:ConstantKernel.forward": ["654c84c28a7768a2", "6c52bd008f8582ca"],
    "gpytorch.kernels.cosine_kernel:CosineKernel.forward": ["60cc042a401caaaf"],
    "gpytorch.kernels.index_kernel:IndexKernel.forward": ["b02851ba563f2b9b"],
    "gpytorch.kernels.kernel:AdditiveKernel.forward": ["b2c1f829c268922f", "fcd4e412d11f7090"],
    "gpytorch.kernels.kernel:Kernel.__call__": ["3ceae6001b1d3796", "54377a5c8163a72d"],
    "gpytorch.kernels.kernel:Kernel.covar_dist": ["190bf536cdd49fe1"],
    "gpytorch.kernels.kernel:Kernel.prediction_strategy": ["46e58ca9ad2d5378"],
    "gpytorch.kernels.kernel:ProductKernel.forward": ["95b228009e4c9ec4", "ed557fd7075c0bf7"],
    "gpytorch.kernels.linear_kernel:LinearKernel.forward": ["dcb16773e5df7daf", "f82e021d8013bd40"],
    "gpytorch.kernels.matern_kernel:MaternKernel.forward": ["4145605fb9e2119e"],
    "gpytorch.kernels.periodic_kernel:PeriodicKernel.forward": ["bddfe4aa7659310f"],
    "gpytorch.kernels.rbf_kernel:RBFKernel.forward": ["db9c184de865ed59"],
    "gpytorch.kernels.rq_kernel:RQKernel.forward": ["21ad811f13f19a28"],
    "gpytorch.kernels.scale_kernel:ScaleKernel.forward": ["8b408f12ac630668"],
    "gpytorch.lazy.lazy_evaluated_kernel_tensor:LazyEvaluatedKernelTensor.__init__": [
        "18c3f2d1db76c16d",
        "23c81debf2aba149",
    ],
    "gpytorch.lazy.lazy_evaluated_kernel_tensor:LazyEvaluatedKernelTensor._size": ["b666ffd6bd083fa7"],
    "gpytorch.lazy.lazy_evaluated_kernel_tensor:LazyEvaluatedKernelTensor.evaluate_kernel": ["e54ce96cf68c62a4"],
    "gpytorch.likelihoods.gaussian_likelihood:FixedNoiseGaussianLikelihood.marginal": ["feb8ae04ea2b7c6d"],
    "gpytorch.likelihoods.gaussian_likelihood:GaussianLikelihood.marginal": ["feb8ae04ea2b7c6d"],
    "gpytorch.likelihoods.gaussian_likelihood:_GaussianLikelihoodBase._shaped_noise_covar": [
        "86514b4a58328ca9",
        "8cc047da8e9e0967",
    ],
    "gpytorch.likelihoods.gaussian_likelihood:_GaussianLikelihoodBase.marginal": ["d15ee0e2d793a3f5"],
    "gpytorch.likelihoods.hadamard_gaussian_likelihood:HadamardGaussianLikelihood._shaped_noise_covar": [
        "255f05b0982d338c"
    ],
    "gpytorch.likelihoods.hadamard_gaussian_likelihood:HadamardGaussianLikelihood.marginal": ["d15ee0e2d793a3f5"],
    "gpytorch.likelihoods.likelihood:Likelihood.__call__": ["0517135bdb8f57f2", "94cb384a2c43ffad"],
    "gpytorch.likelihoods.likelihood:_Likelihood.__call__": ["026861f43628925c", "5a73ab5ee490d97e"],
    "gpytorch.likelihoods.noise_models:Noise.__call__": ["b89ba9ea63793ca2", "d0901d1a4663e16a"],
    "gpytorch.likelihoods.noise_models:_HomoskedasticNoiseBase.forward": ["bfb0bb15433746b1", "e414feb349455250"],
    "gpytorch.means.constant_mean:ConstantMean.forward": ["92082e6d85c21050"],
    "gpytorch.mlls.exact_marginal_log_likelihood:ExactMarginalLogLikelihood._add_other_terms": ["d50a2b9761578d02"],
    "gpytorch.mlls.exact_marginal_log_likelihood:ExactMarginalLogLikelihood.forward": ["23dd21ab0e1c2f4d"],
    "gpytorch.mlls.leave_one_out_pseudo_likelihood:LeaveOneOutPseudoLikelihood.forward": ["fe9a64003cf8aac0"],
    "gpytorch.models.exact_gp:ExactGP.__call__": ["77ee703253c0c6b9", "fcd274319733ee75"],
    "gpytorch.models.exact_gp:ExactGP._get_test_prior_mean_and_covariances": ["", "41b778cacccdb990"],
    "gpytorch.models.exact_prediction_strategies:DefaultPredictionStrategy.__init__": [
        "84571dc0ad03fab2",
        "fc629d37aae0c954",
    ],
    "gpytorch.models.exact_prediction_strategies:DefaultPredictionStrategy._mean_cache": [
        "0889db3f66758c75",
        "c7f513f0b1b670b6",
    ],
    "gpytorch.models.exact_prediction_strategies:DefaultPredictionStrategy.exact_prediction": [
        "2ae526807e45976e",
        "d5792983531f6275",
    ],
    "gpytorch.models.exact_prediction_strategies:DefaultPredictionStrategy.get_fantasy_strategy": [
        "688f058f6c5d6234",
        "dbd32bb8ed9348e1",
    ],
    "gpytorch.module:Module.train": ["2ed57275bff72d17"],
    "gpytorch.priors.prior:Prior.log_prob": ["2d834f94fe2a7a02", "b14a6e99c1fd59bb"],
    "linear_operator.operators._linear_operator:LinearOperator._cholesky": ["e2f1107183e50c8a"],
    "linear_operator.operators._linear_operator:LinearOperator.matmul": ["86432346c73ab807"],
    "linear_operator.operators.diag_linear_operator:DiagLinearOperator.matmul": ["4783c99d84151004"],
    "linear_operator.operators.mul_linear_operator:MulLinearOperator.__init__": ["c2451a49612c86ed"],
}
