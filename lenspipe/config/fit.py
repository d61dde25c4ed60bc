"""The fits, and where they run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lenspipe.config.fields import Count, Positive, Section


class Fit(Section):
    """MAP and Hamiltonian Monte Carlo for every lens (stage `fit`)."""

    shard_size: Count = Field(500, description="lenses in one job")
    batch_size: Count | Literal["auto"] = Field(
        "auto", description="lenses fitted together in one batched program; auto: as many as the memory holds"
    )
    search: Literal["gauss_newton", "adam"] = Field(
        "gauss_newton", description="MAP search; adam, the paper's, compares"
    )
    starts: Count = Field(24, description="starting points of the MAP search per lens, the scouts")
    scouts: Count = Field(8, description="scouts that go on after every rung of the ladder of temperatures")
    scout_pixels: int = Field(
        48, ge=8, description="least side of the image on whose coarse pixels the scouts climb [px]"
    )
    scout_components: Count = Field(32, description="principal components that a learned source has for the scouts")
    survivors: Count = Field(4, description="scouts that are followed with the whole source")
    rival_gap: Positive = Field(
        50.0, description="another solution that is not further below the best is followed to the end too [nat]"
    )
    temperatures: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (50.0, 25.0, 12.0, 6.0, 3.0, 1.5),
        min_length=1,
        description="factors on the noise, from first to last, that the scouts climb at",
    )
    settling_temperatures: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (6.0, 3.0, 1.5, 1.0), min_length=1, description="the same for those that survive, with the whole source"
    )
    steps_per_temperature: Count = Field(4, description="greatest number of Gauss-Newton steps at each temperature")
    final_steps: Count = Field(60, description="greatest number of Gauss-Newton steps on all pixels")
    explorations: int = Field(
        0, ge=0, description="times that annealed chains look for a solution with more evidence, at most"
    )
    adam_steps: Count = Field(10_000, description="steps of Adam, where it is the search; the paper's number")
    adam_learning_rate: Positive = Field(0.02, description="its first learning rate; it falls to zero")
    sampler: Literal["hmc", "pyro_nuts", "pyro_hmc", "svi_full_rank", "svi_low_rank"] = Field(
        "hmc", description="what draws from the posterior; all but hmc are for comparison, one lens at a time"
    )
    chains: int = Field(4, ge=2, description="Markov chains per lens")
    warmup: int = Field(
        200, ge=20, description="draws per chain that tune steps, metric and path length and are thrown away"
    )
    draws: int = Field(300, ge=20, description="draws kept per chain")
    target_accept: float = Field(0.8, gt=0.4, lt=1, description="mean acceptance that the step size is tuned to")
    rounds: Count = Field(
        2, description="rounds of draws for a lens that misses a gate; each makes as many draws as all before it"
    )
    r_hat_max: float = Field(1.05, gt=1, description="gate: greatest R-hat of the lens parameters")
    ess_min: float = Field(100, ge=0, description="gate: least effective sample size of them, bulk and tail")
    path_length: Positive = Field(
        3.0,
        description="least mean trajectory length in whitened coordinates; where draws have a greater standard "
        "deviation along any direction, that is the mean",
    )
    max_leapfrog_steps: int = Field(32, ge=1, le=1024, description="greatest number of leapfrog steps of one draw")
    svi_steps: Count = Field(2000, description="steps of variational inference, where it is the sampler")
    svi_learning_rate: Positive = Field(0.01, description="its first learning rate; it falls to a hundredth")
    svi_rank: Count = Field(10, description="rank of the covariance of svi_low_rank, beside its diagonal")

    @model_validator(mode="after")
    def _ends_cold(self) -> Fit:
        if self.settling_temperatures[-1] != 1:
            raise ValueError(
                "the last of settling_temperatures must be 1 (the true noise), "
                f"found {self.settling_temperatures[-1]:g}"
            )
        return self


class Cluster(Section):
    """Where batches of lenses are fitted, inside stage `fit`; results do not depend on it, a change reruns nothing."""

    kind: Literal["local", "address", "slurm"] = Field(
        "local",
        description="local: processes of the machine or SLURM job that the stage runs in; address: a Dask scheduler "
        "that runs already; slurm: jobs that the stage itself submits, as many as it needs",
    )
    address: str | None = Field(
        None, description="of the scheduler, such as tcp://host:8786, or the path of its scheduler file"
    )
    site: str = Field(
        "workflow/profiles/slurm/dask.yaml",
        description="Dask's settings for the site, with what a SLURM job of a worker asks for; a relative path is "
        "taken from the folder the run is in, then from the one of the Snakefile",
    )
    jobs_min: int = Field(0, ge=0, description="SLURM jobs that are kept even with nothing to do")
    jobs_max: Count = Field(20, description="greatest number of SLURM jobs of one shard")
    retries: int = Field(
        2, ge=0, description="times that a batch is tried again after its worker died, before it is halved"
    )

    @model_validator(mode="after")
    def _complete(self) -> Cluster:
        if self.kind == "address" and not self.address:
            raise ValueError("kind is address, but no address is given; write that of the Dask scheduler")
        if self.jobs_min > self.jobs_max:
            raise ValueError(f"jobs_min ({self.jobs_min}) must not be above jobs_max ({self.jobs_max})")
        return self
