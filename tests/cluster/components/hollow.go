package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	"github.com/spf13/cobra"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	fakes "k8s.io/cri-api/pkg/apis/testing"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubemark"
	imagevolume "k8s.io/kubernetes/pkg/volume/image"
)

// What a hollow node does with a container is told by words in its image's reference.
const (
	neverPulls = "never-pulls" // the image can't be pulled
	crashes    = "crashes"     // every container of it ends at once with exit code 1 and says lastWords
	neverReady = "never-ready" // its containers run and never become ready
	lastWords  = "this image crashes, as its name says"
)

// Size of every hollow node: the machines that models are served on.
const (
	nodeCores       = 192
	nodeMemoryBytes = 2 << 40
)

type hollowOptions struct {
	kubeconfig string
	folder     string
	number     int
	maxPods    int
	resources  string
}

// Kubemark's nodes are the real kubelet over a fake container runtime. Three things of kubemark's own command are different here:
// init containers end (its runtime lets them run for ever), readiness follows the container's state (it calls everything ready),
// and pods have addresses of their own. One process is one node, since the kubelet registers its metrics once for a process.
func newHollowNodeCommand() *cobra.Command {
	options := hollowOptions{}
	command := &cobra.Command{
		Use:           "hollow-node",
		Short:         "A node without containers: the real kubelet over a fake runtime",
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(command *cobra.Command, _ []string) error {
			return options.run(command.Context())
		},
	}
	flags := command.Flags()
	flags.StringVar(&options.kubeconfig, "kubeconfig", "", "who the node is")
	flags.StringVar(&options.folder, "folder", "", "where it writes")
	flags.IntVar(&options.number, "number", 0, "which node: its name is hollow-<number>")
	flags.IntVar(&options.maxPods, "max-pods", 1000, "pods on a node")
	flags.StringVar(&options.resources, "extended-resources", "nvidia.com/gpu=8", "devices of a node, as name=quantity, by comma")
	return command
}

func (o *hollowOptions) run(ctx context.Context) error {
	devices := v1.ResourceList{}
	for _, pair := range strings.Split(o.resources, ",") {
		name, quantity, found := strings.Cut(pair, "=")
		if !found {
			return fmt.Errorf("%q is not name=quantity", pair)
		}
		parsed, err := resource.ParseQuantity(quantity)
		if err != nil {
			return fmt.Errorf("%q: %w", pair, err)
		}
		devices[v1.ResourceName(name)] = parsed
	}
	config, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig)
	if err != nil {
		return err
	}
	config.UserAgent = "hollow-kubelet"
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.QPS, config.Burst = 300, 600
	client, err := clientset.NewForConfig(config)
	if err != nil {
		return err
	}
	node, err := o.node(client, devices)
	if err != nil {
		return err
	}
	node.Run(ctx)
	return nil
}

func (o *hollowOptions) node(client *clientset.Clientset, devices v1.ResourceList) (*kubemark.HollowKubelet, error) {
	name := fmt.Sprintf("hollow-%d", o.number)
	flags, config := kubemark.GetHollowKubeletConfig(&kubemark.HollowKubeletOptions{NodeName: name, MaxPods: o.maxPods})
	// Kubemark has made it in /tmp.
	if err := os.RemoveAll(flags.RootDirectory); err != nil {
		return nil, err
	}
	flags.RootDirectory = o.folder
	config.StaticPodPath = filepath.Join(o.folder, "static-pods")
	config.PodLogsDir = filepath.Join(o.folder, "pod-logs")
	logs := filepath.Join(o.folder, "last-words")
	for _, folder := range []string{config.StaticPodPath, config.PodLogsDir, logs} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return nil, err
		}
	}
	config.EnableServer = false // nobody asks a hollow node for logs
	config.ReadOnlyPort = 0
	config.SerializeImagePulls = false
	config.RegistryPullQPS = 0 // 0 is no limit
	pods := &podTable{}
	runtime := newHollowRuntime(o.number, logs, pods)
	images := &hollowImages{fakes.NewFakeImageService()}
	images.SetFakeImageSize(1 << 20)
	node := kubemark.NewHollowKubelet(flags, config, client, client, &hollowMachine{cadvisortest.Fake{NodeName: name}}, images,
		runtime, cm.NewStubContainerManagerWithDevicePluginResource(devices))
	node.KubeletDeps.ProbeManager = &hollowProbes{pods: pods}
	node.KubeletDeps.VolumePlugins = append(node.KubeletDeps.VolumePlugins, imagevolume.ProbeVolumePlugins()...)
	return node, nil
}

type hollowMachine struct{ cadvisortest.Fake }

func (m *hollowMachine) MachineInfo() (*cadvisorapi.MachineInfo, error) {
	info, err := m.Fake.MachineInfo()
	if err == nil {
		info.NumCores, info.MemoryCapacity = nodeCores, nodeMemoryBytes
	}
	return info, err
}

type hollowImages struct{ *fakes.FakeImageService }

func (i *hollowImages) PullImage(ctx context.Context, image *runtimeapi.ImageSpec, auth *runtimeapi.AuthConfig,
	sandbox *runtimeapi.PodSandboxConfig) (string, error) {
	if strings.Contains(image.Image, neverPulls) {
		return "", fmt.Errorf("%s: not found", image.Image)
	}
	return i.FakeImageService.PullImage(ctx, image, auth, sandbox)
}

// The runtime is told of containers, not of pods; the prober is told of pods, and earlier.
type podTable struct{ byUID sync.Map }

func (t *podTable) endsByItself(uid, container string) bool {
	known, ok := t.byUID.Load(types.UID(uid))
	if !ok {
		return false
	}
	for _, init := range known.(*v1.Pod).Spec.InitContainers {
		if init.Name == container {
			return init.RestartPolicy == nil || *init.RestartPolicy != v1.ContainerRestartPolicyAlways
		}
	}
	return false
}

type hollowRuntime struct {
	*fakes.FakeRuntimeService
	node      int
	logs      string
	pods      *podTable
	addresses atomic.Uint32
}

func newHollowRuntime(node int, logs string, pods *podTable) *hollowRuntime {
	runtime := fakes.NewFakeRuntimeService()
	runtime.FakeStatus = &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
		{Type: runtimeapi.RuntimeReady, Status: true},
		{Type: runtimeapi.NetworkReady, Status: true},
	}}
	return &hollowRuntime{FakeRuntimeService: runtime, node: node, logs: logs, pods: pods}
}

// The fake runtime gives all pods one address; endpoints then can't be told apart.
func (r *hollowRuntime) RunPodSandbox(ctx context.Context, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	id, err := r.FakeRuntimeService.RunPodSandbox(ctx, config, handler)
	if err != nil {
		return "", err
	}
	number := r.addresses.Add(1)
	r.Lock()
	defer r.Unlock()
	// 198.18.0.0/15 is for tests of devices (RFC 2544): nobody listens there.
	address := fmt.Sprintf("198.%d.%d.%d", 18+r.node%2, (uint32(r.node)/2*16+number>>8)%256, number%256)
	r.Sandboxes[id].PodSandboxStatus.Network.Ip = address
	return id, nil
}

func (r *hollowRuntime) StartContainer(ctx context.Context, id string) error {
	if err := r.FakeRuntimeService.StartContainer(ctx, id); err != nil {
		return err
	}
	r.Lock()
	defer r.Unlock()
	container := r.Containers[id]
	labels := container.GetLabels()
	ends := r.pods.endsByItself(labels["io.kubernetes.pod.uid"], labels["io.kubernetes.container.name"])
	fails := strings.Contains(container.GetImage().GetUserSpecifiedImage()+container.GetImage().GetImage(), crashes)
	if !ends && !fails {
		return nil
	}
	container.State = runtimeapi.ContainerState_CONTAINER_EXITED
	container.FinishedAt = time.Now().UnixNano()
	container.Reason = "Completed"
	if fails {
		container.ExitCode, container.Reason = 1, "Error"
		path := filepath.Join(r.logs, strings.ReplaceAll(id, "/", "_"))
		line := fmt.Sprintf("%s stderr F %s\n", time.Now().UTC().Format(time.RFC3339Nano), lastWords)
		if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
			return err
		}
		container.LogPath = path
	}
	return nil
}

// Every probe succeeds as soon as its container runs, unless the image says otherwise.
type hollowProbes struct{ pods *podTable }

// A sidecar's start and life are asked of the kubelet's own probe results, which nobody writes here: without the probes its
// running is enough. This is called before the kubelet looks at the containers, with the very pod that it then looks at.
func (p *hollowProbes) AddPod(_ context.Context, pod *v1.Pod) {
	for index := range pod.Spec.InitContainers {
		pod.Spec.InitContainers[index].StartupProbe = nil
		pod.Spec.InitContainers[index].LivenessProbe = nil
	}
	p.pods.byUID.Store(pod.UID, pod)
}

func (p *hollowProbes) RemovePod(pod *v1.Pod)            { p.pods.byUID.Delete(pod.UID) }
func (p *hollowProbes) StopLivenessAndStartup(_ *v1.Pod) {}

func (p *hollowProbes) CleanupPods(desired map[types.UID]sets.Empty) {
	p.pods.byUID.Range(func(uid, _ any) bool {
		if _, wanted := desired[uid.(types.UID)]; !wanted {
			p.pods.byUID.Delete(uid)
		}
		return true
	})
}

func (p *hollowProbes) UpdatePodStatus(_ context.Context, pod *v1.Pod, status *v1.PodStatus) {
	sidecars := sets.New[string]()
	images := map[string]string{}
	for _, container := range append(append([]v1.Container{}, pod.Spec.InitContainers...), pod.Spec.Containers...) {
		images[container.Name] = container.Image
		if container.RestartPolicy != nil && *container.RestartPolicy == v1.ContainerRestartPolicyAlways {
			sidecars.Insert(container.Name)
		}
	}
	set := func(of []v1.ContainerStatus, initial bool) {
		for index := range of {
			state := &of[index]
			running := state.State.Running != nil
			state.Started = &running
			if initial && !sidecars.Has(state.Name) {
				state.Ready = state.State.Terminated != nil && state.State.Terminated.ExitCode == 0
			} else {
				state.Ready = running && !strings.Contains(images[state.Name], neverReady)
			}
		}
	}
	set(status.InitContainerStatuses, true)
	set(status.ContainerStatuses, false)
}
