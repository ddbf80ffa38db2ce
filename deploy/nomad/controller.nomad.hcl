# A controller on every node that runs VMs. `nomad job run controller.nomad.hcl`, with Nomad 1.9.6 or newer.
#
# Each node needs the package `vestibule`, /var/lib/vestibule with images and snapshots, and in /etc/vestibule the files that
# vestibule.toml names: run-vm.json (beside this file), cluster.key, nomad.token (a token whose policy is
# `namespace "default" { capabilities = ["submit-job", "read-job"] }`). The node's Nomad has to allow what is asked for here and
# in run-vm.json: `plugin "raw_exec" { config { enabled = true } }`, and `client { max_kill_timeout = "90s" }`.
job "vestibule" {
  type = "system"

  # One node after the other; sign-ins go on meanwhile, for their runners are jobs of their own.
  update {
    max_parallel     = 1
    min_healthy_time = "10s"
  }

  group "controller" {
    network {
      port "https" { static = 4443 }
    }

    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "controller" {
      driver = "raw_exec"
      user   = "root"

      config {
        command = "/usr/bin/vestibule"
        args    = ["--home", "/var/lib/vestibule", "serve", "--config", "/etc/vestibule/vestibule.toml"]
      }

      env {
        VESTIBULE_NODE = "${node.unique.id}"
      }

      # Requests that are under way end.
      kill_timeout = "30s"

      service {
        provider = "nomad"
        port     = "https"

        # Nomad asks by the node's address: that is no name which a controller has, and none that its certificate is for.
        # Older ones than 1.9.6 refuse `tls_skip_verify` here.
        check {
          type            = "http"
          protocol        = "https"
          path            = "/health"
          interval        = "10s"
          timeout         = "5s"
          tls_skip_verify = true

          header {
            Host = ["localhost:4443"]
          }
        }
      }

      resources {
        cpu    = 500
        memory = 512
      }
    }
  }
}
